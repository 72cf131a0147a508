"""The commands that write and read ONNX files."""
