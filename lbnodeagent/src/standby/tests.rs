//! The state machine with time driven by hand.

use super::*;

const MS: Duration = Duration::from_millis(1);

fn owner() -> Watched {
    Watched {
        node: "owner".into(),
        link: 2,
        address: IpAddr::from([10, 0, 0, 1]),
    }
}

/// What its kernel is asked.
fn inquiry() -> Inquiry {
    Inquiry {
        ip: IpAddr::from([10, 0, 0, 9]),
        mac: [2, 0, 0, 0, 0, 1],
        own_mac: [2, 0, 0, 0, 0, 2],
        own: IpAddr::from([10, 0, 0, 2]),
    }
}

/// All the time.
fn steady(watches: impl IntoIterator<Item = (Watched, Option<Inquiry>)>) -> Assignment {
    crate::rounds::extend(&Assignment::new(), &watches.into_iter().collect())
}

/// A watcher of one owner over a wire without delay.
struct Pair {
    standby: Standby,
    now: Duration,
    agent_answers: bool,
    kernel_answers: bool,
    sent: Vec<(Duration, Question)>,
}

impl Pair {
    fn new() -> Self {
        let mut standby = Standby::default();
        standby.watch(Duration::ZERO, &steady([(owner(), Some(inquiry()))]));
        Self {
            standby,
            now: Duration::ZERO,
            agent_answers: true,
            kernel_answers: true,
            sent: Vec::new(),
        }
    }

    /// Runs for a while, or until the verdict is this one; returns how long that took.
    fn run(&mut self, time: Duration, until: Option<Verdict>) -> Duration {
        let start = self.now;
        while self.now < start + time {
            for question in self.standby.poll(self.now) {
                match &question {
                    Question::Probe { sequence, .. } if self.agent_answers => {
                        self.standby.agent_answered(self.now, *sequence);
                    }
                    Question::Kernel { link, inquiry } if self.kernel_answers => {
                        self.standby.kernel_answered(self.now, *link, inquiry.ip, inquiry.mac);
                    }
                    Question::Kernel { link, inquiry } => {
                        // Somebody else who says that it is his; and what is not what was asked.
                        let Inquiry { ip, mac, own, .. } = *inquiry;
                        for (link, ip, mac) in [(*link, ip, [6; 6]), (*link, own, mac), (link + 1, ip, mac)] {
                            self.standby.kernel_answered(self.now, link, ip, mac);
                        }
                    }
                    Question::Probe { .. } | Question::Call { .. } => {}
                }
                self.sent.push((self.now, question));
            }
            if Some(self.verdict()) == until {
                break;
            }
            self.now = self.standby.wake_at().unwrap().min(start + time);
        }
        self.now.saturating_sub(start)
    }

    fn verdict(&self) -> Verdict {
        self.standby.verdicts()[&owner()]
    }

    fn cut(&mut self) {
        self.agent_answers = false;
        self.kernel_answers = false;
    }
}

#[test]
fn an_owner_that_answers_is_asked_forty_times_a_second_and_its_kernel_is_left_alone() {
    let mut pair = Pair::new();
    pair.run(Duration::from_secs(1), None);
    pair.sent.clear();
    pair.run(Duration::from_secs(10), None);
    assert_eq!(pair.verdict(), Verdict::Agent);
    assert_eq!(pair.sent.len(), 400);
    assert!(
        pair.sent
            .iter()
            .all(|(_, question)| matches!(question, Question::Probe { .. }))
    );
}

#[test]
fn an_owner_that_is_cut_off_is_silent_after_a_tenth_of_a_second() {
    for milliseconds in 0..25 {
        let mut pair = Pair::new();
        pair.run(Duration::from_secs(5) + milliseconds * MS, None);
        pair.cut();
        pair.sent.clear();
        let took = pair.run(Duration::from_secs(1), Some(Verdict::Silent));
        assert!((75 * MS..=100 * MS).contains(&took), "{took:?}");
        let asked = pair.sent.iter().filter(|(_, q)| matches!(q, Question::Kernel { .. }));
        assert!(asked.count() >= 5, "its kernel is asked first");
    }
}

#[test]
fn an_owner_whose_agent_was_killed_is_known_by_its_kernel_for_as_long_as_that_answers() {
    let mut pair = Pair::new();
    pair.run(Duration::from_secs(1), None);
    pair.agent_answers = false;
    pair.run(Duration::from_mins(10), Some(Verdict::Silent));
    assert_eq!(pair.verdict(), Verdict::Node);
    pair.cut();
    assert!(pair.run(Duration::from_secs(1), Some(Verdict::Silent)) <= 100 * MS);
}

#[test]
fn only_the_agent_leads_back_from_silence_and_it_hears_that_it_was_replaced() {
    let mut pair = Pair::new();
    pair.run(Duration::from_secs(1), None);
    pair.cut();
    pair.run(Duration::from_secs(1), None);
    pair.kernel_answers = true;
    pair.run(Duration::from_mins(1), None);
    assert_eq!(pair.verdict(), Verdict::Silent, "a rebooted node has no VIP");
    pair.agent_answers = true;
    pair.sent.clear();
    assert!(pair.run(Duration::from_secs(1), Some(Verdict::Agent)) <= 300 * MS);
    pair.run(Duration::from_secs(3), None);
    let told: Vec<Duration> = pair
        .sent
        .iter()
        .filter(|(_, question)| {
            matches!(
                question,
                Question::Probe {
                    has_taken_over: true,
                    ..
                }
            )
        })
        .map(|(at, _)| *at)
        .collect();
    let time = told.last().unwrap().saturating_sub(told[0]);
    assert!(time >= Duration::from_secs(1) && time <= TAKEN_OVER_TOLD, "{time:?}");
}

#[test]
fn what_the_watcher_slept_is_not_the_owners_silence() {
    let mut pair = Pair::new();
    pair.run(Duration::from_secs(5), None);
    for pause in [50, 100, 150, 300, 1000, 5000] {
        pair.now += pause * MS;
        // What came in meanwhile waits to be read; here nothing did.
        pair.standby.poll(pair.now);
        assert_eq!(pair.verdict(), Verdict::Agent, "{pause} ms");
        pair.run(Duration::from_secs(1), None);
    }
    pair.cut();
    let took = pair.run(Duration::from_secs(1), Some(Verdict::Silent));
    assert!(took <= 100 * MS, "the pauses made nobody more patient: {took:?}");
}

#[test]
fn an_owner_that_was_never_heard_is_not_silent() {
    let mut pair = Pair::new();
    pair.cut();
    pair.run(Duration::from_secs(10), None);
    assert_eq!(pair.verdict(), Verdict::Unheard);
    assert!(pair.sent.len() < 100, "{} questions", pair.sent.len());
}

#[test]
fn irregular_answers_make_the_watcher_more_patient_up_to_a_limit_and_it_forgets() {
    let mut pair = Pair::new();
    pair.kernel_answers = false;
    pair.run(Duration::from_secs(5), None);
    for (name, pause, expected) in [
        ("late", 60 * MS, 100 * MS..=130 * MS),
        ("too late: a false alarm", 150 * MS, 200 * MS..=300 * MS),
        ("far too late", 900 * MS, 400 * MS..=400 * MS),
    ] {
        for _ in 0..5 {
            pair.agent_answers = false;
            pair.run(pause, None);
            pair.agent_answers = true;
            pair.run(400 * MS, None);
        }
        let patience = pair.standby.threshold(&owner()).unwrap();
        assert!(expected.contains(&patience), "{name}: {patience:?}");
    }
    pair.run(Duration::from_mins(2), None);
    assert_eq!(pair.standby.threshold(&owner()), Some(100 * MS));
}

#[test]
fn an_answer_counts_once_and_only_to_a_question_that_was_asked() {
    let mut pair = Pair::new();
    pair.run(Duration::from_secs(1), None);
    let Some((_, Question::Probe { sequence, .. })) = pair.sent.last().cloned() else {
        panic!("no probe");
    };
    pair.cut();
    for _ in 0..100 {
        pair.standby.agent_answered(pair.now, sequence);
        pair.standby.agent_answered(pair.now, sequence + 1000);
        pair.run(10 * MS, None);
    }
    assert_eq!(pair.verdict(), Verdict::Silent);
}

#[test]
fn questions_per_second_do_not_grow_beyond_the_budget() {
    for (watches, expected) in [(1_u8, 40_u32), (10, 400), (50, 400), (200, 400)] {
        let mut standby = Standby::default();
        let wanted = (0..watches).map(|number| {
            let watched = Watched {
                node: format!("node{number}"),
                link: 2,
                address: IpAddr::from([10, 0, 0, number]),
            };
            (watched, None)
        });
        standby.watch(Duration::ZERO, &steady(wanted));
        let mut now = Duration::ZERO;
        let mut sent = 0_u32;
        while now < Duration::from_mins(1) {
            for question in standby.poll(now) {
                let Question::Probe { sequence, .. } = question else {
                    continue;
                };
                standby.agent_answered(now, sequence);
                if now >= Duration::from_secs(10) {
                    sent += 1;
                }
            }
            now = standby.wake_at().unwrap().max(now + MS / 1000);
        }
        let per_second = sent / 50;
        assert!(
            per_second.abs_diff(expected) <= expected / 20 + 1,
            "{watches} watches: {per_second}/s"
        );
    }
}

#[test]
fn nobody_watched_costs_nothing() {
    let mut standby = Standby::default();
    standby.watch(Duration::ZERO, &Assignment::new());
    assert_eq!((standby.poll(Duration::ZERO), standby.wake_at()), (vec![], None));
}

#[test]
fn a_host_that_was_not_asked_keeps_nobody_alive_and_families_are_judged_apart() {
    let mut standby = Standby::default();
    let v6 = Watched {
        address: "fd00::1".parse().unwrap(),
        ..owner()
    };
    let of_v6 = Inquiry {
        ip: "fd00::9".parse().unwrap(),
        ..inquiry()
    };
    standby.watch(
        Duration::ZERO,
        &steady([(owner(), Some(inquiry())), (v6.clone(), Some(of_v6))]),
    );
    let mut now = Duration::ZERO;
    while now < Duration::from_secs(2) {
        for question in standby.poll(now) {
            match question {
                // IPv4 fails after a second.
                Question::Probe { address, sequence, .. } if address.is_ipv6() || now < Duration::from_secs(1) => {
                    standby.agent_answered(now, sequence);
                }
                _ => {}
            }
        }
        // Unasked for.
        standby.kernel_answered(now, 2, of_v6.ip, of_v6.mac);
        now = standby.wake_at().unwrap();
    }
    assert_eq!(
        standby.verdicts(),
        BTreeMap::from([(owner(), Verdict::Silent), (v6, Verdict::Agent)])
    );
}

#[test]
fn questions_by_one_family_leave_those_by_the_other_their_pace() {
    let of = |is_v4: bool| {
        (0..10_u8).map(move |number| {
            let address = if is_v4 {
                IpAddr::from([10, 0, 0, number])
            } else {
                IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 0, number.into()])
            };
            let watched = Watched {
                node: format!("node{number}"),
                link: 2,
                address,
            };
            (watched, None)
        })
    };
    let mut standby = Standby::default();
    standby.watch(Duration::ZERO, &steady(of(true).chain(of(false))));
    assert_eq!(standby.beat.interval, INTERVAL);
    standby.watch(Duration::ZERO, &steady(of(true)));
    assert_eq!(standby.beat.interval, INTERVAL);
}

/// A node on call, at two addresses, by a node that watches another one steadily, over a wire without delay.
struct OnCall {
    standby: Standby,
    now: Duration,
    /// What answers at each address: its agent, its kernel.
    answers: BTreeMap<IpAddr, (bool, bool)>,
    sent: Vec<(Duration, Question)>,
}

const V4: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 1));
const V6: IpAddr = IpAddr::V6(std::net::Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 1));
const MATE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 2));

fn at(address: IpAddr) -> Watched {
    let node = if address == MATE { "mate" } else { "owner" };
    Watched {
        node: node.into(),
        address,
        ..owner()
    }
}

impl OnCall {
    fn new(pace: Pace) -> Self {
        let mut on_call = Self {
            standby: Standby::default(),
            now: Duration::ZERO,
            answers: [V4, V6, MATE].map(|address| (address, (true, true))).into(),
            sent: Vec::new(),
        };
        on_call.watch(pace);
        on_call.run(Duration::from_secs(1));
        on_call.sent.clear();
        on_call
    }

    fn watch(&mut self, pace: Pace) {
        let of = |address: IpAddr| {
            let watching = Watching {
                inquiry: Some(Inquiry {
                    ip: address,
                    ..inquiry()
                }),
                pace: if address == MATE { Pace::Steady } else { pace },
                is_successor: true,
            };
            (at(address), watching)
        };
        self.standby.watch(self.now, &[V4, V6, MATE].map(of).into());
    }

    fn run(&mut self, time: Duration) {
        let end = self.now + time;
        while self.now < end {
            for question in self.standby.poll(self.now) {
                match &question {
                    Question::Probe { address, sequence, .. } if self.answers[address].0 => {
                        self.standby.agent_answered(self.now, *sequence);
                    }
                    Question::Kernel { link, inquiry } if self.answers[&inquiry.ip].1 => {
                        self.standby.kernel_answered(self.now, *link, inquiry.ip, inquiry.mac);
                    }
                    _ => {}
                }
                self.sent.push((self.now, question));
            }
            self.now = self.standby.wake_at().unwrap().max(self.now + MS / 100).min(end);
        }
    }

    fn call(&mut self) {
        self.standby.called(self.now, &packet::node_id("owner"), 75 * MS);
    }

    fn set(&mut self, addresses: &[IpAddr], answers: (bool, bool)) {
        for address in addresses {
            self.answers.insert(*address, answers);
        }
    }

    fn verdict(&self, address: IpAddr) -> Verdict {
        self.standby.verdicts()[&at(address)]
    }

    /// How often the owner was asked.
    fn asked(&self) -> usize {
        let probes = self
            .sent
            .iter()
            .filter(|(_, question)| matches!(question, Question::Probe { node, .. } if node == "owner"));
        probes.count()
    }
}

#[test]
fn a_node_on_call_is_asked_once_at_each_address_and_left_alone_then() {
    let mut on_call = OnCall::new(Pace::OnCall);
    on_call.run(Duration::from_mins(1));
    assert_eq!(on_call.asked(), 0);
    assert_eq!(
        on_call.verdict(V4),
        Verdict::Unknown,
        "nobody knows what it would answer now"
    );
}

#[test]
fn one_that_was_called_missing_is_judged_by_what_it_answers_itself() {
    let none: &[IpAddr] = &[];
    for (name, lost, answers, v4, v6) in [
        ("a false alarm", none, (true, true), Verdict::Unknown, Verdict::Unknown),
        (
            "it is dead",
            &[V4, V6],
            (false, false),
            Verdict::Silent,
            Verdict::Silent,
        ),
        (
            "it has lost IPv4",
            &[V4],
            (false, false),
            Verdict::Silent,
            Verdict::Agent,
        ),
        (
            "its agent was killed",
            &[V4, V6],
            (false, true),
            Verdict::Node,
            Verdict::Node,
        ),
    ] {
        let mut on_call = OnCall::new(Pace::OnCall);
        on_call.set(lost, answers);
        on_call.call();
        on_call.run(PATIENCE + MS);
        assert_eq!((on_call.verdict(V4), on_call.verdict(V6)), (v4, v6), "{name}");
        let asked = on_call.asked();
        assert!((2..=8).contains(&asked), "{name}: {asked}");
        on_call.run(Duration::from_mins(1));
        assert_eq!(
            (on_call.verdict(V4), on_call.verdict(V6)),
            (v4, v6),
            "{name}: after a minute"
        );
        let silent = on_call.standby.last_signs().map(|(_, at)| at).min();
        let expected = lost
            .first()
            .filter(|_| !answers.1)
            .map(|_| Duration::from_millis(1000 - 75));
        assert_eq!(silent, expected, "{name}");
    }
}

#[test]
fn whoever_is_back_on_call_is_told_that_it_was_replaced_and_left_alone_again() {
    let mut on_call = OnCall::new(Pace::OnCall);
    on_call.set(&[V4, V6], (false, false));
    on_call.call();
    on_call.run(Duration::from_secs(10));
    on_call.set(&[V4, V6], (true, true));
    on_call.sent.clear();
    on_call.run(Duration::from_secs(1));
    assert_eq!(on_call.verdict(V4), Verdict::Unknown);
    let told = |question: &Question| {
        matches!(
            question,
            Question::Probe {
                has_taken_over: true,
                ..
            }
        )
    };
    assert!(on_call.sent.iter().filter(|(_, question)| told(question)).count() >= 3);
    on_call.run(Duration::from_secs(5));
    on_call.sent.clear();
    on_call.run(Duration::from_mins(1));
    assert_eq!(on_call.asked(), 0);
}

#[test]
fn false_calls_cost_some_questions_a_second_however_many_there_are() {
    let mut on_call = OnCall::new(Pace::OnCall);
    for _ in 0..10_000 {
        on_call.call();
        on_call.run(MS / 10);
    }
    assert!(on_call.asked() <= 2 * 11, "{} in a second", on_call.asked());
    on_call
        .standby
        .called(on_call.now, &packet::node_id("nobody"), Duration::ZERO);
}

#[test]
fn one_that_gossip_has_given_up_is_asked_now_and_then_and_missed_without_a_call() {
    let mut on_call = OnCall::new(Pace::OnCall);
    on_call.watch(Pace::Slow);
    on_call.run(100 * MS);
    assert_eq!(on_call.verdict(V4), Verdict::Agent, "it is asked at once");
    on_call.sent.clear();
    on_call.run(Duration::from_secs(10));
    assert!((38..=42).contains(&on_call.asked()), "{}", on_call.asked());
    on_call.set(&[V4], (false, false));
    on_call.run(2 * SLOW_INTERVAL);
    assert_eq!(
        (on_call.verdict(V4), on_call.verdict(V6)),
        (Verdict::Silent, Verdict::Agent)
    );
    // What is dead already when gossip gives it up.
    let mut on_call = OnCall::new(Pace::OnCall);
    on_call.set(&[V4, V6], (false, false));
    on_call.watch(Pace::Slow);
    on_call.run(PATIENCE + MS);
    assert_eq!(on_call.verdict(V4), Verdict::Silent);
}

#[test]
fn one_that_is_watched_steadily_from_now_on_is_believed_when_it_answers_and_missed_as_soon_as_any() {
    let mut on_call = OnCall::new(Pace::OnCall);
    on_call.watch(Pace::Steady);
    assert_eq!(on_call.verdict(V4), Verdict::Unknown);
    on_call.run(5 * MS);
    assert_eq!(on_call.verdict(V4), Verdict::Agent);
    let mut on_call = OnCall::new(Pace::OnCall);
    on_call.set(&[V4, V6], (false, false));
    on_call.watch(Pace::Steady);
    on_call.run(99 * MS);
    assert_eq!(on_call.verdict(V4), Verdict::Unknown);
    on_call.run(2 * MS);
    assert_eq!(on_call.verdict(V4), Verdict::Silent);
    let is_call = |(_, question): &&(Duration, Question)| matches!(question, Question::Call { .. });
    assert_eq!(on_call.sent.iter().filter(is_call).count(), 1, "the others hear of it");
}

#[test]
fn those_who_watch_a_node_call_it_missing_before_it_is_silent_to_them_and_once_more_when_it_is() {
    let mut pair = Pair::new();
    pair.run(Duration::from_secs(5), None);
    pair.cut();
    let cut = pair.now;
    pair.run(Duration::from_mins(1), None);
    let calls: Vec<(Duration, Duration)> = pair
        .sent
        .iter()
        .filter_map(|(at, question)| match question {
            Question::Call { silence, .. } => Some((at.saturating_sub(cut), *silence)),
            _ => None,
        })
        .collect();
    let [(first, silence), (second, _)] = calls[..] else {
        panic!("{calls:?}");
    };
    assert!(first <= 76 * MS && silence >= 75 * MS, "{calls:?}");
    assert!(second > first && second <= 101 * MS, "{calls:?}");
    // One whose agent was killed is there.
    let mut pair = Pair::new();
    pair.run(Duration::from_secs(5), None);
    pair.agent_answers = false;
    pair.run(Duration::from_mins(1), None);
    assert!(
        pair.sent
            .iter()
            .all(|(_, question)| !matches!(question, Question::Call { .. }))
    );
}

#[test]
fn a_node_where_answers_come_irregularly_is_as_patient_with_those_on_call() {
    let mut on_call = OnCall::new(Pace::OnCall);
    // The one that is watched answers now and then late.
    for _ in 0..200 {
        on_call.set(&[MATE], (false, true));
        on_call.run(90 * MS);
        on_call.set(&[MATE], (true, true));
        on_call.run(60 * MS);
    }
    on_call.set(&[V4, V6], (false, false));
    on_call.call();
    on_call.run(PATIENCE + MS);
    assert_eq!(on_call.verdict(V4), Verdict::Unknown);
    on_call.run(MOST_PATIENCE);
    assert_eq!(on_call.verdict(V4), Verdict::Silent);
}

/// The moment in which somebody comes into doubt is as long after its last answer as that was after the question. Nothing is to be done until it
/// may be asked again: a watcher that is woken meanwhile has nothing to do, and takes that for time in which it did not run.
#[test]
fn who_is_silent_at_several_addresses_is_missed_as_soon_however_long_answers_take_and_nobody_is_polled_in_vain() {
    let addresses = [(V4, 0_u32), (V6, 7)];
    for delay in 1..100_u32 {
        let delay = MS * delay / 10;
        let mut standby = Standby::default();
        standby.watch(
            Duration::ZERO,
            &steady(addresses.map(|(address, _)| (at(address), None))),
        );
        let cut = Duration::from_secs(2);
        let (mut now, mut polls) = (Duration::ZERO, 0);
        let mut answers: BTreeSet<(Duration, u64)> = BTreeSet::new();
        let is_missed = |standby: &Standby| standby.verdicts().values().all(|verdict| *verdict == Verdict::Silent);
        while !is_missed(&standby) {
            assert!(now < cut + Duration::from_secs(1), "answers after {delay:?}");
            for (_, sequence) in answers.extract_if(..=(now, u64::MAX), |_| true) {
                standby.agent_answered(now, sequence);
            }
            polls += u32::from(now >= cut);
            for question in standby.poll(now) {
                if let Question::Probe { sequence, address, .. } = question
                    && now < cut
                {
                    let more = addresses.iter().find(|(known, _)| *known == address).unwrap().1;
                    answers.insert((now + delay + MS * more / 10, sequence));
                }
            }
            let wake = standby.wake_at().unwrap();
            assert!(wake > now, "answers after {delay:?}: polled in vain at {now:?}");
            now = answers.first().map_or(wake, |(at, _)| wake.min(*at));
        }
        assert!(polls < 40, "answers after {delay:?}: {polls} polls");
        let time = now.saturating_sub(cut);
        assert!(time < 115 * MS, "answers after {delay:?}: {time:?}");
    }
}
