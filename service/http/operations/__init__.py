"""The routes for those who run the service: probes, metrics, bundles, the repository of bundles, and the pages.

None of them waits for work on images.
"""
