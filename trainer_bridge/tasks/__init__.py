"""Problems, and rewards for answers to them."""
