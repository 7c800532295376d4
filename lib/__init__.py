"""One-class speech deepfake detection by Student-Teacher Feature Pyramid Matching: the shared module of the study."""
