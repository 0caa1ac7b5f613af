"""What goes out with a finished adapter: its model card, and the push to the Hugging Face Hub. It imports only packages
that are earlier in README's list. Begin with model_card.py.
"""
