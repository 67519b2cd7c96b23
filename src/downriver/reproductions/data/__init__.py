"""Papers of the data room."""
