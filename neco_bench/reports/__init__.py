"""Tables, pages and comparisons made of results."""
