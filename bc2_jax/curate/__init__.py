"""Raw text -> clean, deduplicated, weighted documents, on a distributed dataframe engine (paper section 2.1)."""
