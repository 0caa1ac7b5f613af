"""What goes out with a finished adapter: its model card, and the push to the Hugging Face Hub. It imports train.reports
and what stands below. Begin with model_card.py.
"""
