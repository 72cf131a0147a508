"""What a bundle gives to other programs: its nets as ONNX, and its images, many millions of them.

May know bundles and inference, and nothing of training.
"""
