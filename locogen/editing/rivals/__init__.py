"""Other ways to make a model do without a concept, to set beside the closed-form edit."""
