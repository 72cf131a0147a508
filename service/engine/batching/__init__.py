"""Rows of many callers joined into batches: who waits, for how long, and who gets which rows back.

Knows nothing of nets and devices: `batch` says what an engine gets, and what it may raise.
"""
