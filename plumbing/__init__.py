"""What a reader may skip: files, formats, kernels, memory, manners. One concept a file."""
