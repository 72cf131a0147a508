"""All that only a GPU needs: streams, pinned memory, CUDA graphs, noise of its own. `device.GPU` is the way in.

It is imported only where a GPU is used. No GPU has run it yet: its tests imitate one on a CPU.
"""
