"""A sink of an engine that gathers what it is given."""


class Heard:
    """A sink that gathers."""

    def __init__(self):
        self.ids, self.ends, self.reused, self.logprobs, self.top = {}, {}, {}, {}, {}
        self.order = []

    def __call__(self, pieces):
        self.order.append([p.number for p in pieces])
        for p in pieces:
            assert p.number not in self.ends, "nothing follows an end"
            self.ids.setdefault(p.number, []).extend(p.ids)
            self.logprobs.setdefault(p.number, []).extend(p.logprobs or ())
            self.top.setdefault(p.number, []).extend(p.top or ())
            self.reused[p.number] = self.reused.get(p.number, 0) + p.reused
            if p.finish is not None:
                self.ends[p.number] = (p.finish, p.error)
