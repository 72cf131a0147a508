"""What `gan-client` does, a file for each command. Nothing else of gan_client knows them."""
