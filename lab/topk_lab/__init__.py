"""The experiments of the book: data, models, training, sweeps and the records that every figure is drawn from."""
