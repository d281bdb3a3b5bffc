"""Images: what every source shares, and the sources."""
