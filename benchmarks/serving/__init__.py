"""How fast the service is, beside others and beside the machine's limit, and what each of its parts brings."""
