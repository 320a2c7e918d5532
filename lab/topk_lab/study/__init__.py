"""The science of single chapters: calibration, synthetic sets, limited models, contenders, times and bytes."""
