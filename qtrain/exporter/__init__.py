"""What else a quantized model is written as."""
