"""One candidate, rendered."""

from grape_service.rows.candidate import Candidate


def user(text):
    return [{"role": "user", "content": text}]


def candidate(prompt, response, **over):
    prompt = user(prompt) if isinstance(prompt, str) else prompt
    return Candidate(prompt=prompt, response=response, prompt_id="p", candidate_id="c", **over)


def one(renderer, *args, **over):
    [result] = renderer.render([candidate(*args, **over)])
    return result
