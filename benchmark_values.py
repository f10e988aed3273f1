"""Values of the test benchmark: what stands in a conversation, the gold answer and its aliases, in both languages.

A value is {"en": {"said", "aliases"}, "zh": {...}, "order": number or None}; `said` is the gold answer and the form
the speakers use. Listed kinds (dishes, towns ...) come from data/skeletons_words.json, all others are composed here.
"""
import re

DIGITS_ZH = "零一二三四五六七八九"
ONES = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
        "seventeen eighteen nineteen").split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
MONTHS = ("January February March April May June July August September October November December").split()
WEEKDAYS = (("Monday", "一"), ("Tuesday", "二"), ("Wednesday", "三"), ("Thursday", "四"), ("Friday", "五"),
            ("Saturday", "六"), ("Sunday", "日"))
CODE_LETTERS = "ABCDEFGHJKLMNPRSTUVWXYZ"  # no I, O, Q: they read like digits


def words_en(number):
    """The number in English words, 0 to 99; in digits above."""
    if number < 20:
        return ONES[number]
    if number > 99:
        return str(number)
    tens, ones = divmod(number, 10)
    return TENS[tens - 2] + (f"-{ONES[ones]}" if ones else "")


def words_zh(number):
    """The number in Chinese characters, 0 to 99; in digits above."""
    if number < 10:
        return DIGITS_ZH[number]
    if number > 99:
        return str(number)
    tens, ones = divmod(number, 10)
    return ("" if tens == 1 else DIGITS_ZH[tens]) + "十" + (DIGITS_ZH[ones] if ones else "")


def draw_value(rng, spec, words):
    """One value of the attribute `spec`: {"kind", and "low", "high", "step" where numbers are drawn}."""
    kind = spec["kind"]
    if kind in words:
        return listed(rng.choice(words[kind]))
    return COMPOSED[kind](rng, spec)


def listed(entry):
    """The value for a line "English|Chinese" of the word lists."""
    en, zh = entry.split("|")
    return _value(en, [], zh, [])


def _value(en, aliases_en, zh, aliases_zh, order=None):
    return {"en": {"said": en, "aliases": aliases_en}, "zh": {"said": zh, "aliases": aliases_zh}, "order": order}


def _time(rng, first, last, offset):
    hour, minute = rng.randint(first, last), rng.choice((5, 10, 15, 20, 25, 30, 35, 40, 45, 50, 55))
    digits = f"{hour}:{minute:02d}"
    hour_zh = "两" if hour == 2 else words_zh(hour)
    long_zh = f"{hour_zh}点{'零' if minute < 10 else ''}{words_zh(minute)}"
    said_zh = f"{hour_zh}点半" if minute == 30 else f"{long_zh}分" if minute == 10 else long_zh
    forms_zh = [long_zh, f"{long_zh}分", digits, f"{hour}点{minute}", f"{hour}点{minute:02d}分", f"{hour}点{minute}分",
                f"{hour}点{long_zh.split('点')[1]}"]
    forms_en = [f"{words_en(hour)} {'oh ' if minute < 10 else ''}{words_en(minute)}"]
    if minute == 30:
        forms_en.append(f"half past {words_en(hour)}")
        forms_zh.append(f"{hour}点半")
    if offset:
        forms_en.append(f"{hour + offset}:{minute:02d}")
        forms_zh.append(f"{hour + offset}:{minute:02d}")
    return _value(digits, forms_en, said_zh, forms_zh, 60 * (hour + offset) + minute)


def _date(rng, spec):
    month, day = rng.randint(1, 12), rng.randint(1, 28)
    name = MONTHS[month - 1]
    ending = "th" if 10 < day < 20 else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")
    en = [f"{name} {day}", f"{day}{ending} of {name}", f"{name} {day}{ending}", f"{day}{ending} {name}"]
    zh = [f"{month}月{day}日", f"{words_zh(month)}月{words_zh(day)}号", f"{words_zh(month)}月{words_zh(day)}日"]
    return _value(f"{day} {name}", en, f"{month}月{day}号", zh, 100 * month + day)


def _weekday(rng, spec):
    index = rng.randrange(7)
    en, zh = WEEKDAYS[index]
    return _value(en, [f"{en}s"], f"星期{zh}", [f"周{zh}", f"礼拜{zh}"] + (["星期天", "周天"] if zh == "日" else []))


def _number(rng, spec):
    number = rng.randint(spec["low"], spec["high"])
    forms_en = [words_en(number)] if number < 100 else []
    forms_zh = [words_zh(number)] if number < 100 else []
    if number == 2:
        forms_zh.append("两")
    if 3 <= number <= 10:  # small numbers are said in words
        return _value(forms_en[0], [str(number)], forms_zh[0], [str(number)], number)
    return _value(str(number), forms_en, str(number), forms_zh, number)


def _money(rng, spec):
    amount = rng.randrange(spec["low"], spec["high"] + 1, spec["step"])
    en = [str(amount), f"€{amount}", f"{amount} euro"]
    zh = [str(amount), f"{amount}欧", f"€{amount}"]
    if amount < 100:
        en.append(f"{words_en(amount)} euros")
        zh.append(f"{words_zh(amount)}欧元")
    return _value(f"{amount} euros", en, f"{amount}欧元", zh, amount)


def _code(rng, spec):
    code = f"{''.join(rng.sample(CODE_LETTERS, 2))}-{rng.randint(101, 989)}"
    return _value(code, [code.replace("-", " ")], code, [])


def _seat(rng, spec):
    seat = f"{rng.randint(1, 39)}{rng.choice('BCDEFG')}"
    return _value(seat, [re.sub(r"(\d+)", r"\1 ", seat)], seat, [])


def _ext(rng, spec):
    number = str(rng.randint(2011, 9879))
    return _value(number, [], number, [])


COMPOSED = {
    "time_dawn": lambda rng, spec: _time(rng, 4, 7, 0),
    "time_am": lambda rng, spec: _time(rng, 5, 11, 0),
    "time_pm": lambda rng, spec: _time(rng, 1, 7, 12),
    "date": _date, "weekday": _weekday, "number": _number, "money": _money, "code": _code, "seat": _seat, "ext": _ext,
}
