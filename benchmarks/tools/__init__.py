"""What the programs share: load, processes, proxies and the report at the end."""
