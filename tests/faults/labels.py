"""A labeler for completions too short to have a gold score that tells them apart."""


def spelling(prompts, completions):
    return [sum(map(ord, str(completion))) % 101 / 10 for completion in completions]
