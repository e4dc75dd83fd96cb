"""Models judged by what they predict: scores, residuals, data left out."""
