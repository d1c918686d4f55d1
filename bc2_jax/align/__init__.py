"""From a base model to a chat model (paper section 3)."""
