"""Point clouds: what every source shares, meshes, and the sources."""
