"""Programs that put load on a real service process and say what it did: a table, then one JSON line."""
