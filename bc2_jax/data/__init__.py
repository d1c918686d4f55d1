"""Text -> tokens -> packed rows -> resumable batches."""
