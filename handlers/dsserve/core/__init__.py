"""Words that every other package uses: errors, requests, the step's plan, a text's times."""
