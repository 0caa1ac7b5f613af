"""Model files: where they are, how tensors are named, read, written and loaded, and quantized copies on disk. The
package imports flux2.models and the packages below it. Begin with loading.py; sources.py finds the files.
"""
