"""The offline commands, one file each: `add_to` says what its command line may hold, `run` does it.

May know everything in `models`; nothing but `__main__` knows them.
"""
