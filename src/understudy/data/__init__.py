"""Images in: where they lie, decoded once and kept, split, and served as views and batches."""
