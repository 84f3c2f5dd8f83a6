"""The main job in small: four stages, real digits, real English text, and questions that prove what was learned."""
