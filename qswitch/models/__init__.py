"""Loading, quantising, checking and cutting models, and the adapters of the one that trains."""
