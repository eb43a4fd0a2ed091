"""Other people's models: read, run and written in their own formats."""
