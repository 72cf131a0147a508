"""Between a bundle and other programs: its nets as ONNX, its images by the million, and generators trained elsewhere.

May know bundles, nets and inference, and nothing of training; nothing of serving knows it.
"""
