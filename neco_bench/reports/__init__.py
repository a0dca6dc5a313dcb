"""Tables, pages and comparisons made from results."""
