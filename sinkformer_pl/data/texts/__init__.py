"""Texts: what every source shares, the subword tokenizer, and the sources."""
