"""The Baichuan 2 decoder: token ids -> hidden states -> logits."""
