from topk.operators.threshold import threshold_mask
