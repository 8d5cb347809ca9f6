"""The tables and the page of the verb `inspect`."""
