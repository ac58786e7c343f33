"""A trained student as other programs want it: a merged folder."""
