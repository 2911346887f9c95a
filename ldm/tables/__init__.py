"""Tables as users have them: genes, captions, annotations, votes."""
