"""What quanttune costs as models, sequences and batches grow."""
