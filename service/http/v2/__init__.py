"""The Open Inference Protocol (v2): each bundle's nets as models, with tensors in and out; and the bundles' repository.

It translates to the same calls as the service's own routes.
"""
