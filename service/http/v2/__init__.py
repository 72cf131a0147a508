"""The Open Inference Protocol (v2): each bundle's nets as models, with tensors in and out.

It translates to the same calls as the service's own routes. Bundles are loaded and unloaded in
../operations/repository.py.
"""
