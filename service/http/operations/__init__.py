"""The routes for those who run the service: probes, metrics, bundles and the pages.

None of them waits for work on images.
"""
