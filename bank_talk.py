"""Planning and writing one training conversation: Plan chooses speakers and facts, Talk turns them into turns.

All wording comes from the Bank (bank_values.py), so nothing here knows a language.
"""
from dataclasses import dataclass

from bank_values import BankError

FACT_COUNTS = (3, 4, 5, 6, 6, 7, 7, 8, 8, 8, 9, 9, 10, 10, 11, 12)
SPEAKER_COUNTS = (2, 2, 2, 3, 3, 4)
P_TWO_FACT, P_CORRECTION, P_PAIR, P_SAME_RELATION = 0.15, 0.15, 0.3, 0.6
P_OPENER, P_CLOSER, P_SMALL_TALK, P_ACKNOWLEDGE = 0.5, 0.3, 0.12, 0.2
P_KNOWN_PERSON, MAX_JOINED = 0.3, 2
P_OWNER_SPEAKS, P_OWNER_ASKED, P_QUESTION_TURN, P_SAME_TURN = 0.85, 0.35, 0.2, 0.35
MAX_TRIES = 400


@dataclass
class Fact:
    relation: dict
    subject: str
    value: str
    question_said: str | None = None  # a question spoken in the conversation is not used as the probe

    def people(self):
        """Who should not state it in the third person: the owner, and a person who is the value."""
        return {self.subject, self.value}


class Plan:
    """Who speaks and what will be said: 2 to 4 speakers, n facts, the pairs of facts that a question can join.

    topics: ids of the relations that single facts are drawn from; None for all.
    """

    def __init__(self, bank, rng, split, n_facts, topics=None):
        self.bank, self.rng, self.split = bank, rng, split
        self.relations = bank.forms(split)
        self.on_topic = [r for r in self.relations if topics is None or r["id"] in topics]
        self.names, self.values, self.facts = set(), set(), []
        self.speakers = [self.new_name("person") for _ in range(rng.choice(SPEAKER_COUNTS))]
        self.owners = {"person": rng.sample(self.speakers, rng.choice((0, 1, 1, 2)))}
        if n_facts >= 3 and rng.random() < P_TWO_FACT:
            self.add_chain()
        for _ in range(MAX_TRIES):
            if len(self.facts) >= n_facts:
                return
            self.add_block(n_facts - len(self.facts))
        raise BankError(f"{bank.path}: no {n_facts} different facts found; add relations or ask for fewer facts")

    def new_name(self, kind):
        """A name that neither holds nor is held by another name of this conversation, and is no value of it."""
        for _ in range(MAX_TRIES):
            name = self.bank.draw(kind, self.split, self.rng)
            if name.casefold() not in self.values and not any(name.casefold() in other or other in name.casefold() for other in self.names):
                self.names.add(name.casefold())
                return name
        raise BankError(f"{self.bank.path}: kinds.{kind} has too few names; add syllables")

    def pick_owner(self, relation):
        """An owner met before, so that one has several attributes, or a new one."""
        known = self.owners.setdefault(relation["subject"], [])
        free = [owner for owner in known if self.is_free(relation, owner)]
        if free and self.rng.random() < 0.35 + 0.12 * len(known):
            return self.rng.choice(free)
        known.append(self.new_name(relation["subject"]))
        return known[-1]

    def is_free(self, relation, subject):
        """Whether the owner has neither this relation nor one whose questions could be mixed up with it."""
        group = relation.get("group", relation["id"])
        return all(f.subject != subject or f.relation.get("group", f.relation["id"]) != group for f in self.facts)

    def add_fact(self, relation, subject, value=None):
        """Add the fact, unless no value is left that this conversation has not used."""
        value = value or self.pick_value(relation, subject)
        if value is not None:
            self.facts.append(Fact(relation, subject, value))

    def pick_value(self, relation, subject):
        """A new value, or a person met before who is no other fact's value."""
        if relation["value"] == "person" and self.rng.random() < P_KNOWN_PERSON:
            taken = {subject} | {fact.value for fact in self.facts}
            known = [owner for owner in self.owners["person"] if owner not in taken]
            if known:
                return self.rng.choice(known)
        return self.new_value(relation)

    def new_value(self, relation):
        """A value that nothing else in this conversation has; None if the kind is used up (dev has few words)."""
        if relation["value"] in self.bank.content["name_kinds"]:
            return self.new_name(relation["value"])
        for _ in range(MAX_TRIES):
            value = self.bank.draw(relation["value"], self.split, self.rng)
            if value.casefold() not in self.values and value.casefold() not in self.names:
                self.values.add(value.casefold())
                return value
        return None

    def add_block(self, room):
        """One fact, or the same relation for two or three owners."""
        relation = self.rng.choice(self.on_topic)
        owners = self.rng.choice((2, 2, 3)) if self.rng.random() < P_SAME_RELATION else 1
        for _ in range(min(owners, room)):
            self.add_fact(relation, self.pick_owner(relation))

    def add_chain(self):
        """Owner -> person -> value, and the second relation for somebody else too, so that both facts are needed."""
        first = self.rng.choice([r for r in self.relations if r.get("as_subject")])
        second = self.rng.choice([r for r in self.relations if r["subject"] == "person" and r["id"] != first["id"]])
        owner, person = self.pick_owner(first), self.new_name("person")
        self.owners["person"].append(person)
        self.add_fact(first, owner, person)
        self.add_fact(second, person)
        self.add_fact(second, self.pick_owner(second))

    def question(self, fact):
        """A question for the fact, in words that the conversation did not use."""
        forms = [form for form in fact.relation["questions"] if form != fact.question_said]
        form = self.rng.choice(forms or fact.relation["questions"])
        return self.bank.sentence(self.bank.fill(form, s=fact.subject))

    def joined_questions(self):
        """[(question, answer, [first, second])]: the second fact's owner is named only as the first fact's value."""
        chains = [(one, two) for one in self.facts if one.relation.get("as_subject") for two in self.facts
                  if two.subject == one.value and self.is_hidden(one, two)]
        picked = self.rng.sample(chains, min(MAX_JOINED, len(chains)))
        return [(self.joined_question(one, two), two.value, [one, two]) for one, two in picked]

    def is_hidden(self, one, two):
        """Whether the second fact alone leaves the answer open: another owner has the same attribute."""
        rivals = [f for f in self.facts if f.relation["id"] == two.relation["id"] and f is not two]
        return bool(rivals) and two.relation["id"] != one.relation["id"] and two.value != one.subject

    def joined_question(self, one, two):
        form, possessive = self.rng.choice(two.relation["questions"]), self.bank.content["possessive"]
        phrases = one.relation["as_subject"]
        if possessive and "{s}" + possessive in form:  # "the mentor of A's dog" would be read as A's dog
            phrases = [phrase for phrase in phrases if phrase.startswith("{s}")]
        subject = self.bank.fill(self.rng.choice(phrases), s=one.subject)
        return self.bank.sentence(self.bank.fill(form, s=subject))


class Talk:
    """Writes the planned facts into turns. A turn is [speaker, pieces]; a piece is (text, facts it states)."""

    def __init__(self, plan):
        self.plan, self.bank, self.rng, self.split = plan, plan.bank, plan.rng, plan.split
        self.turns, self.late = [], []
        self.corrected = self.rng.choice(plan.facts) if self.rng.random() < P_CORRECTION else None

    def phrase(self, name):
        return self.rng.choice(self.bank.phrases(name, self.split))

    def other_speaker(self, avoid=frozenset()):
        """Somebody to speak: nobody of `avoid` and not the last speaker, if it can be helped."""
        able = [s for s in self.plan.speakers if s not in avoid] or self.plan.speakers
        fresh = [s for s in able if not self.turns or s != self.turns[-1][0]]
        return self.rng.choice(fresh or able)

    def say(self, speaker, text, facts=()):
        """Append a sentence; one that states facts goes into the speaker's own last turn where that is still open."""
        text = self.bank.sentence(text)
        if self.turns and self.turns[-1][0] == speaker and facts:
            self.turns[-1][1].append((text, facts))
        else:
            self.turns.append([speaker, [(text, facts)]])

    def chat(self, name):
        speaker = self.other_speaker()
        others = [s for s in self.plan.speakers if s != speaker]
        self.say(speaker, self.bank.fill(self.phrase(name), other=self.rng.choice(others)))

    def write(self, passages):
        """All turns: the facts in random order, chat and passages between them."""
        units = self.units() + passages
        self.rng.shuffle(units)
        if self.rng.random() < P_OPENER:
            self.chat("openers")
        for unit in units:
            if self.rng.random() < P_SMALL_TALK:
                self.chat("small_talk")
            if isinstance(unit, str):
                self.say(self.other_speaker(), self.phrase("prose_intros") + " ".join(unit.split()))
            else:
                self.tell(unit)
            self.correct_late(unit is units[-1])
        if self.rng.random() < P_CLOSER:
            self.chat("closers")

    def correct_late(self, at_once):
        """The delayed correction, if one is open: at a random later point, at the end at the latest."""
        for text, fact in self.late[:]:
            if at_once or self.rng.random() < 0.3:
                self.say(self.other_speaker(fact.people()), text, (fact,))
                self.late.remove((text, fact))

    def units(self):
        """Facts to be told at once: single ones, and pairs of the same relation where it has a sentence for two."""
        units = []
        for fact in self.plan.facts:
            last = units[-1] if units else []
            if len(last) == 1 and self.can_pair(last[0], fact) and self.rng.random() < P_PAIR:
                last.append(fact)
            else:
                units.append([fact])
        return units

    def can_pair(self, one, two):
        """Whether one sentence can state both, said by somebody who is neither owner."""
        same = one.relation is two.relation and one.relation["pairs"] and self.corrected not in (one, two)
        return same and not one.people() | two.people() >= set(self.plan.speakers)

    def tell(self, unit):
        """State one unit in a way that is open to it."""
        fact = unit[0]
        if len(unit) == 2:
            return self.tell_pair(unit)
        if fact is self.corrected:
            return self.tell_corrected(fact)
        owner_here = fact.subject in self.plan.speakers
        if owner_here and fact.relation["first_person"] and self.rng.random() < P_OWNER_SPEAKS:
            if fact.relation["ask_owner"] and self.rng.random() < P_OWNER_ASKED:
                return self.tell_asked(fact, fact.relation["ask_owner"], fact.subject)
            return self.tell_plain(fact, "first_person", fact.subject)
        if self.rng.random() < P_QUESTION_TURN and len(set(self.plan.speakers) - fact.people()) >= 2:
            fact.question_said = self.rng.choice(fact.relation["questions"])
            return self.tell_asked(fact, [fact.question_said], None)
        return self.tell_plain(fact, "statements", None)

    def tell_plain(self, fact, form, speaker):
        """One sentence, in a turn of its own or added to the last speaker's turn."""
        if speaker is None:
            speaker = self.other_speaker(fact.people())
            if self.turns and self.turns[-1][0] not in fact.people() and self.rng.random() < P_SAME_TURN:
                speaker = self.turns[-1][0]
        self.lead_in(speaker)
        sentence = self.bank.fill(self.rng.choice(fact.relation[form]), s=fact.subject, v=fact.value)
        self.say(speaker, self.connector("connectors") + sentence, (fact,))

    def lead_in(self, speaker):
        """Sometimes a short reaction to the facts of the turn before, opening the speaker's own turn."""
        if self.turns and self.turns[-1][0] != speaker and self.turns[-1][1][-1][1]:
            if self.rng.random() < P_ACKNOWLEDGE:
                self.say(speaker, self.phrase("acknowledgements"))

    def connector(self, name):
        """What leads from the facts before to the next; nothing where none has been said yet."""
        return self.phrase(name) if any(facts for turn in self.turns for _, facts in turn[1]) else ""

    def tell_pair(self, unit):
        one, two = unit
        speaker = self.other_speaker(one.people() | two.people())
        template = self.rng.choice(one.relation["pairs"])
        self.lead_in(speaker)
        self.say(speaker, self.bank.fill(template, s=one.subject, v=one.value, s2=two.subject, v2=two.value), (one, two))

    def tell_asked(self, fact, questions, answerer):
        """A question turn and its answer: the owner stands only in the turn before the value."""
        owner_answers = answerer is not None
        asker = self.other_speaker(fact.people())
        answerer = answerer or self.rng.choice([s for s in self.plan.speakers if s not in fact.people() | {asker}])
        self.lead_in(asker)
        question = self.bank.fill(self.rng.choice(questions), s=fact.subject)
        self.say(asker, self.connector("question_connectors") + question, (fact,))
        frames = fact.relation["answers"]
        if not frames or self.rng.random() < 0.4:
            frames = self.bank.phrases("owner_answer_frames" if owner_answers else "answer_frames", self.split)
        frame = self.rng.choice(frames)
        self.say(answerer, self.bank.fill(frame, v=fact.value), (fact,))

    def tell_corrected(self, fact):
        """A wrong value first, put right at once or some turns later; only the right one is the fact's."""
        wrong, speaker = self.plan.new_value(fact.relation), self.other_speaker(fact.people())
        if wrong is None:
            return self.tell_plain(fact, "statements", None)
        sentence = self.bank.fill(self.rng.choice(fact.relation["statements"]), s=fact.subject, v=wrong)
        if self.rng.random() < 0.5:
            self.say(speaker, sentence, (None,))
            late = self.phrase("late_corrections")
            self.late.append((self.bank.fill(late, s=fact.subject, old=wrong, new=fact.value), fact))
            return
        self.say(speaker, sentence, (fact,))
        self.say(speaker, self.bank.fill(self.phrase("corrections"), old=wrong, new=fact.value), (fact,))

    def render(self):
        """(text, {id(fact): [start, end]}) with one turn a line."""
        text, spans = "", {}
        for speaker, pieces in self.turns:
            text += ("\n" if text else "") + speaker + self.bank.content["speaker_colon"]
            for number, (piece, facts) in enumerate(pieces):
                text += self.bank.content["sentence_joiner"] if number else ""
                for fact in filter(None, facts):
                    spans.setdefault(id(fact), [len(text), 0])[1] = len(text) + len(piece)
                text += piece
        return text, spans
