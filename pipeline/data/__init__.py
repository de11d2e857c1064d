"""From a store to batches: sampling, augmentation, loading."""
