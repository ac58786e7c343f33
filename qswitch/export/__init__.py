"""A trained student as other programs want it: a merged folder, GGUF files, a repository on the hub."""
