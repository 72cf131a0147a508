"""What both clients share: requests are built and replies are read here, and nothing is sent.

Knows the errors and results of gan_client, and no client.
"""
