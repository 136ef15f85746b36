//! The lab itself: bringing it up, acting on it, and taking it down whatever happens.

use std::fmt::Write as _;
use std::fs::{File, TryLockError};
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use k8s_openapi::api::authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::{Node as NodeObject, ServiceAccount};
use kube::api::PostParams;
use kube::{Api, Client};

use crate::anchor::{Anchor, Door, ROOT, check_root};
use crate::control_plane::{self, Access};
use crate::http::{self, Answer};
use crate::kubelets;
use crate::kubernetes;
use crate::net::{self, Node, Wiring};
use crate::pods;
use crate::process::{Output, Process, Program};
use crate::rights;
use crate::wait::wait_until;

/// Which rules kube-proxy makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ProxyMode {
    /// nftables.
    #[default]
    Nftables,
    /// iptables.
    Iptables,
    /// There is no kube-proxy.
    None,
}

/// The namespaces of the nodes of a lab that has three, as it has unless told otherwise.
pub const NODES: [&str; 3] = ["m", "w11", "w12"];

/// What a lab is to be like.
#[derive(Debug, Clone)]
pub struct Options {
    /// Names the directory of the logs; the test's name unless set.
    pub name: Option<String>,
    /// How many nodes, the control plane's included: 3 unless set.
    pub nodes: u8,
    /// How they are wired; with racks there are four nodes, whatever `nodes` says.
    pub wiring: Wiring,
    /// Which rules kube-proxy makes.
    pub proxy: ProxyMode,
    /// Whether every node has a container runtime and a kubelet, so that Pods are what they are elsewhere, placed by the real
    /// scheduler, of images made from the programs under test. Without them the lab's own pod runner runs a web server for every Pod.
    pub kubelets: bool,
    /// Namespaces whose Pods the lab leaves alone: it has no container runtime, and runs a web server for every Pod.
    pub foreign_namespaces: Vec<String>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            name: None,
            nodes: 3,
            wiring: Wiring::default(),
            proxy: ProxyMode::default(),
            kubelets: false,
            foreign_namespaces: vec!["kube-system".to_owned(), "purelb".to_owned()],
        }
    }
}

impl Options {
    /// One node without a proxy: the API server, and what talks to it, are what counts.
    pub fn one_node() -> Self {
        Self {
            nodes: 1,
            proxy: ProxyMode::None,
            ..Self::default()
        }
    }
}

/// A running cluster with clients and routers. Clones are handles on the same lab.
#[derive(Clone)]
pub struct Lab(Arc<Inner>);

struct Inner {
    anchor: Anchor,
    options: Options,
    nodes: Vec<Node>,
    kubernetes: PathBuf,
    logs: PathBuf,
    started: Instant,
    timeline: Mutex<Vec<(&'static str, Duration)>>,
    /// The programs without which the lab is not one.
    vital: Mutex<Vec<Process>>,
    access: OnceLock<Access>,
}

impl Lab {
    /// Brings a lab up, runs `test` with it and takes it down again.
    ///
    /// The test runs on a thread and a tokio runtime of their own, in the lab's root network namespace: whatever it connects
    /// to is the lab's. When it fails or panics the state of the cluster is added to the logs, which are kept, and the place
    /// is printed; the logs of a success are removed, unless `E2E_KEEP_LOGS` is set.
    ///
    /// ```no_run
    /// # fn main() -> anyhow::Result<()> {
    /// e2e::Lab::run(e2e::Options::default(), async |lab| {
    ///     println!("{}", lab.kubectl(["get", "nodes", "-o", "wide"]).await?);
    ///     Ok(())
    /// })
    /// # }
    /// ```
    pub fn run<T: Send>(options: Options, test: impl AsyncFnOnce(Lab) -> Result<T> + Send) -> Result<T> {
        check_root()?;
        let kubernetes = if options.kubelets {
            // Packed before there are networks that lead nowhere.
            kubernetes::images()?;
            kubernetes::all_binaries()?
        } else {
            kubernetes::binaries()?
        };
        let name = options
            .name
            .clone()
            .unwrap_or_else(|| std::thread::current().name().unwrap_or("lab").to_owned());
        let name = name.replace("::", "-").replace('/', "-");
        // Three kubelets with their Pods leave two processors nothing for another three: what one measures would be the other.
        let _turn = options.kubelets.then(turn).transpose()?;
        let logs = LogDirectory::claim(&name)?;
        let thread = std::thread::Builder::new().name(name);
        std::thread::scope(|scope| {
            let body = || {
                let lab = Lab::prepare(options, kubernetes, logs.path.clone())?;
                lab.door(ROOT)?.enter_network()?;
                // Born in the lab's namespace, as its threads will be.
                let runtime = tokio::runtime::Builder::new_multi_thread()
                    .worker_threads(2)
                    .enable_all()
                    .build()?;
                let outcome = catch_unwind(AssertUnwindSafe(|| {
                    runtime.block_on(async {
                        lab.bring_up().await.context("bringing up the lab")?;
                        test(lab.clone()).await
                    })
                }));
                if let Err(error) = rights::keep(&directory_name(&logs.path), &lab.audit_log()) {
                    eprintln!("what the product asked of the API server is not kept: {error:#}");
                }
                if !matches!(outcome, Ok(Ok(_))) {
                    runtime.block_on(lab.write_state());
                    eprintln!("the lab's logs are in {}", logs.path.display());
                } else if std::env::var_os("E2E_KEEP_LOGS").is_none() {
                    let _ = std::fs::remove_dir_all(&logs.path);
                }
                // Its tasks first, so that none of them complains of the end of the world.
                runtime.shutdown_background();
                lab.0.anchor.end();
                outcome.unwrap_or_else(|panic| resume_unwind(panic))
            };
            match thread.spawn_scoped(scope, body).context("starting a thread")?.join() {
                Ok(result) => result,
                Err(panic) => resume_unwind(panic),
            }
        })
    }

    fn prepare(options: Options, kubernetes: PathBuf, logs: PathBuf) -> Result<Self> {
        let started = Instant::now();
        let anchor = Anchor::start()?;
        let nodes = net::nodes(options.wiring, options.nodes);
        Ok(Self(Arc::new(Inner {
            anchor,
            options,
            nodes,
            kubernetes,
            logs,
            started,
            timeline: Mutex::default(),
            vital: Mutex::default(),
            access: OnceLock::new(),
        })))
    }

    async fn bring_up(&self) -> Result<()> {
        self.mark("namespaces");
        net::build(&self.0.anchor, self.0.options.wiring, &self.0.nodes).context("wiring up")?;
        self.mark("wires");
        let access = control_plane::start(self, self.0.options.proxy).await?;
        let _ = self.0.access.set(access);
        if self.0.options.kubelets {
            kubelets::start(self).await.context("starting the kubelets")?;
        } else {
            pods::start(self)?;
        }
        self.mark("up");
        Ok(())
    }

    // What there is.

    /// The nodes, the control plane's first.
    pub fn nodes(&self) -> &[Node] {
        &self.0.nodes
    }

    /// The node with this namespace (`w11`) or name.
    pub fn node(&self, node: &str) -> Result<&Node> {
        let known = || {
            self.0
                .nodes
                .iter()
                .map(|node| node.ns.as_str())
                .collect::<Vec<_>>()
                .join(", ")
        };
        self.nodes()
            .iter()
            .find(|candidate| candidate.ns == node || candidate.name == node)
            .ok_or_else(|| anyhow!("no node {node:?} among {}", known()))
    }

    /// A client of the API server with the administrator's rights.
    pub fn client(&self) -> Client {
        self.access().client.clone()
    }

    /// The administrator's kubeconfig, a path for programs that run in the lab.
    pub fn admin_kubeconfig(&self) -> &str {
        &self.access().admin
    }

    /// Where this process sees a path of the lab's private `/run`.
    pub fn outside(&self, path: &str) -> PathBuf {
        self.0.anchor.outside(path)
    }

    /// The directory of the logs.
    pub fn logs(&self) -> &Path {
        &self.0.logs
    }

    /// What has come up when, counted from the start.
    pub fn timeline(&self) -> Vec<(&'static str, Duration)> {
        self.0.timeline.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// A command that gives another terminal a shell in a namespace of the lab: `root`, `client`, `w11` …
    pub fn shell_command(&self, ns: &str) -> String {
        let pid = self.0.anchor.pid();
        let net = if ns == ROOT {
            "-n".to_owned()
        } else {
            format!("--net=/proc/{pid}/root/run/netns/{ns}")
        };
        let (kubeconfig, kubernetes) = (self.admin_kubeconfig(), self.0.kubernetes.display());
        format!("nsenter -t {pid} -m -p {net} env KUBECONFIG={kubeconfig} PATH=\"{kubernetes}:$PATH\" bash")
    }

    // What can be done.

    /// Runs a program in a namespace to its end.
    pub async fn try_exec<S: AsRef<str>>(&self, ns: &str, argv: impl IntoIterator<Item = S>) -> Result<Output> {
        self.output(ns, Program::new(argv)).await
    }

    /// Runs a program in a namespace, expects it to succeed and returns what it printed.
    pub async fn exec<S: AsRef<str>>(&self, ns: &str, argv: impl IntoIterator<Item = S>) -> Result<String> {
        self.try_exec(ns, argv).await?.success()
    }

    /// The namespaces of the nodes that have an address, on this interface where one is named and on any otherwise.
    pub async fn holders(&self, address: &str, interface: Option<&str>) -> Result<Vec<String>> {
        let mut holders = Vec::new();
        for node in self.nodes() {
            let show = ["ip", "-brief", "address", "show"].into_iter();
            let on = interface.into_iter().flat_map(|interface| ["dev", interface]);
            if self
                .exec(&node.ns, show.chain(on))
                .await?
                .contains(&format!(" {address}/"))
            {
                holders.push(node.ns.clone());
            }
        }
        Ok(holders)
    }

    /// Waits until exactly these nodes, in the order of [`Lab::nodes`], have an address: see [`Lab::holders`].
    pub async fn held_by(
        &self,
        address: &str,
        interface: Option<&str>,
        nodes: &[&str],
        deadline: Duration,
    ) -> Result<()> {
        let on = interface.unwrap_or("any interface");
        wait_until(
            &format!("{address} is on {on} of {nodes:?} alone"),
            deadline,
            async || {
                let holders = self.holders(address, interface).await?;
                ensure!(holders == nodes, "{holders:?}");
                Ok(())
            },
        )
        .await
    }

    /// Runs a program in a namespace to its end with this process's own input and output: a shell, for example.
    pub async fn interact<S: AsRef<str>>(
        &self,
        ns: &str,
        argv: impl IntoIterator<Item = S>,
        environment: &[(&str, &str)],
    ) -> Result<ExitStatus> {
        let mut program = Program::new(argv);
        for (name, value) in environment {
            program = program.env(name, *value);
        }
        let door = self.door(ns)?;
        tokio::task::spawn_blocking(move || program.interact(&door)).await?
    }

    /// Runs kubectl as the administrator and returns what it printed.
    pub async fn kubectl<S: AsRef<str>>(&self, arguments: impl IntoIterator<Item = S>) -> Result<String> {
        self.output(ROOT, self.kubectl_program(arguments)).await?.success()
    }

    /// Writes into the status of an object what else only a program would: a merge patch, as the administrator.
    pub async fn patch_status(&self, kind: &str, namespace: &str, name: &str, status: serde_json::Value) -> Result<()> {
        let patch = serde_json::json!({"status": status}).to_string();
        let to = ["patch", kind, name, "-n", namespace];
        let how = ["--subresource=status", "--type=merge", "-p", &patch];
        self.kubectl(to.into_iter().chain(how)).await.map(drop)
    }

    /// Applies manifests (YAML or JSON) with kubectl and returns what it printed.
    pub async fn apply(&self, manifests: &str) -> Result<String> {
        let mut program = self.kubectl_program(["apply", "-f", "-"]);
        program.stdin = Some(manifests.to_owned());
        self.output(ROOT, program).await?.success()
    }

    /// Starts a program that runs on in a namespace; what it prints goes to `NAME.log` among the logs.
    pub fn start_process<S: AsRef<str>>(
        &self,
        ns: &str,
        name: &str,
        argv: impl IntoIterator<Item = S>,
        environment: &[(&str, &str)],
    ) -> Result<Process> {
        let mut program = Program::new(argv);
        for (name, value) in environment {
            program = program.env(name, *value);
        }
        program.start(&self.door(ns)?, name, &self.log_file(name))
    }

    /// A kubeconfig with a token of a `ServiceAccount`, a path for programs that run in the lab.
    pub async fn service_account_kubeconfig(&self, namespace: &str, name: &str) -> Result<String> {
        let config = self.service_account_config(namespace, name, None).await?;
        self.keep_kubeconfig(&format!("{namespace}-{name}"), &config)
    }

    /// The same with a token that names a node, as that of a Pod on it does (KEP-4193).
    pub async fn node_kubeconfig(&self, namespace: &str, name: &str, node: &str) -> Result<String> {
        let config = self.service_account_config(namespace, name, Some(node)).await?;
        self.keep_kubeconfig(&format!("{namespace}-{name}-{node}"), &config)
    }

    fn keep_kubeconfig(&self, name: &str, config: &str) -> Result<String> {
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let path = format!("/run/lab/{name}.kubeconfig");
        // Whoever reads the one of a call before must not find it half written.
        let unfinished = self.outside(&format!("{path}.{}", NUMBER.fetch_add(1, Ordering::Relaxed)));
        std::fs::write(&unfinished, config)
            .and_then(|()| std::fs::rename(&unfinished, self.outside(&path)))
            .with_context(|| format!("writing {path}"))?;
        Ok(path)
    }

    /// A client of the API server with the rights of a `ServiceAccount`.
    pub async fn service_account_client(&self, namespace: &str, name: &str) -> Result<Client> {
        control_plane::client(&self.service_account_config(namespace, name, None).await?).await
    }

    /// The same with a token that names a node, as that of a Pod on it does (KEP-4193).
    pub async fn node_client(&self, namespace: &str, name: &str, node: &str) -> Result<Client> {
        control_plane::client(&self.service_account_config(namespace, name, Some(node)).await?).await
    }

    async fn service_account_config(&self, namespace: &str, name: &str, node: Option<&str>) -> Result<String> {
        let accounts: Api<ServiceAccount> = Api::namespaced(self.client(), namespace);
        let bound_object_ref = match node {
            Some(node) => {
                let node = Api::<NodeObject>::all(self.client()).get(node).await?;
                Some(BoundObjectReference {
                    api_version: Some("v1".into()),
                    kind: Some("Node".into()),
                    name: node.metadata.name,
                    uid: node.metadata.uid,
                })
            }
            None => None,
        };
        let request = TokenRequest {
            spec: TokenRequestSpec {
                bound_object_ref,
                expiration_seconds: Some(24 * 3600),
                ..TokenRequestSpec::default()
            },
            ..TokenRequest::default()
        };
        let answer = accounts
            .create_token_request(name, &PostParams::default(), &request)
            .await
            .with_context(|| format!("a token of ServiceAccount {namespace}/{name}"))?;
        let token = answer.status.context("a token request without a token")?.token;
        Ok(self.access().with_token(name, &token).to_string())
    }

    /// Fetches `http://ADDRESS[:PORT]/…` from a namespace, over a new connection, within 5 s.
    pub async fn get(&self, ns: &str, url: &str) -> Result<Answer> {
        http::get(&self.door(ns)?, url).await
    }

    /// Fetches a URL from a namespace with curl, within 5 s, and returns the body.
    pub async fn curl(&self, ns: &str, url: &str) -> Result<String> {
        self.exec(
            ns,
            ["curl", "--silent", "--show-error", "--fail", "--max-time", "5", url],
        )
        .await
    }

    /// Runs `work` on a thread in a network namespace; sockets it opens stay there.
    pub fn in_network<T: Send>(&self, ns: &str, work: impl FnOnce() -> T + Send) -> Result<T> {
        self.door(ns)?.in_network(work)
    }

    /// Pulls a host's cable: its port on the switch goes down.
    pub async fn cut(&self, ns: &str) -> Result<()> {
        self.exec(ROOT, ["ip", "link", "set", "dev", ns, "down"])
            .await
            .map(drop)
    }

    /// Plugs the cable in again.
    pub async fn uncut(&self, ns: &str) -> Result<()> {
        self.exec(ROOT, ["ip", "link", "set", "dev", ns, "up"]).await.map(drop)
    }

    // For the other modules.

    pub(crate) fn options(&self) -> &Options {
        &self.0.options
    }

    pub(crate) fn anchor(&self) -> &Anchor {
        &self.0.anchor
    }

    pub(crate) fn door(&self, ns: &str) -> Result<Door> {
        self.0.anchor.door(ns)
    }

    /// Where the API server writes what the product asked of it.
    pub(crate) fn audit_log(&self) -> PathBuf {
        self.log_file("audit")
    }

    pub(crate) fn log_file(&self, name: &str) -> PathBuf {
        self.0.logs.join(format!("{name}.log"))
    }

    /// The path of a Kubernetes program.
    pub(crate) fn kubernetes(&self, program: &str) -> String {
        self.0.kubernetes.join(program).to_string_lossy().into_owned()
    }

    /// Starts a program without which the lab is not one.
    pub(crate) fn start_vital(&self, ns: &str, name: &str, program: &Program) -> Result<()> {
        let process = program.start(&self.door(ns)?, name, &self.log_file(name))?;
        self.0
            .vital
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(process);
        Ok(())
    }

    pub(crate) fn proxy_mode(&self) -> ProxyMode {
        self.0.options.proxy
    }

    /// Ends the kube-proxy of a node at once. Its rules stay in the kernel.
    pub async fn kill_proxy(&self, node: &str) -> Result<()> {
        let name = control_plane::proxy_of(self.node(node)?);
        let process = {
            let mut vital = self.0.vital.lock().unwrap_or_else(PoisonError::into_inner);
            let place = vital.iter().position(|process| process.name() == name);
            vital.remove(place.with_context(|| format!("{name} does not run"))?)
        };
        process.kill().await.map(|_| ())
    }

    /// Starts the kube-proxy of a node again.
    pub fn start_proxy(&self, node: &str) -> Result<()> {
        control_plane::start_proxy(self, self.node(node)?)
    }

    /// Fails when etcd, a Kubernetes program or another the lab cannot do without has ended.
    pub fn check_processes(&self) -> Result<()> {
        self.0
            .vital
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .iter()
            .try_for_each(Process::check)
    }

    pub(crate) fn mark(&self, what: &'static str) {
        let mut timeline = self.0.timeline.lock().unwrap_or_else(PoisonError::into_inner);
        timeline.push((what, self.0.started.elapsed()));
    }

    pub(crate) fn output(&self, ns: &str, program: Program) -> impl Future<Output = Result<Output>> + use<> {
        let door = self.door(ns);
        async move {
            let door = door?;
            tokio::task::spawn_blocking(move || program.output(&door)).await?
        }
    }

    fn access(&self) -> &Access {
        self.0.access.get().expect("set before the test gets hold of the lab")
    }

    fn kubectl_program<S: AsRef<str>>(&self, arguments: impl IntoIterator<Item = S>) -> Program {
        let mut argv = vec![self.kubernetes("kubectl")];
        argv.extend(arguments.into_iter().map(|argument| argument.as_ref().to_owned()));
        Program::new(argv)
            .env("KUBECONFIG", self.admin_kubeconfig())
            .env("KUBECACHEDIR", "/run/lab/kubectl")
    }

    /// Adds to the logs what the cluster and the kernel hold, for whoever reads them after a failure.
    async fn write_state(&self) {
        let mut state = String::new();
        let mut add = |title: String, outcome: Result<Output>| {
            let text = outcome.map_or_else(|error| format!("{error:#}\n"), |output| output.stdout + &output.stderr);
            let _ = write!(state, "===== {title}\n{text}\n");
        };
        if self.0.access.get().is_some() {
            for what in [
                "nodes,services,endpointslices,pods",
                "events",
                "servicegroups,lbnodeagents,lbnodes",
            ] {
                let program = self.kubectl_program(["--request-timeout=5s", "get", what, "-A", "-o", "wide"]);
                add(format!("kubectl get {what}"), self.output(ROOT, program).await);
            }
        }
        let hosts = self
            .nodes()
            .iter()
            .map(|node| node.ns.as_str())
            .chain(["router", "client", "outside"]);
        for ns in hosts {
            for what in ["addr", "route", "-6 route", "neigh"] {
                let argv = std::iter::once("ip").chain(what.split(' '));
                add(format!("{ns}: ip {what}"), self.try_exec(ns, argv).await);
            }
        }
        let _ = std::fs::write(self.0.logs.join("state.txt"), state);
    }
}

fn directory_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// A directory of logs that no other lab uses, of this process or another: whoever uses it holds the lock beside it.
struct LogDirectory {
    path: PathBuf,
    _lock: File,
}

/// Waits for its turn among the labs with kubelets; it is over when the file is closed.
fn turn() -> Result<File> {
    let base = kubernetes::log_directory()?;
    std::fs::create_dir_all(&base).with_context(|| format!("making {}", base.display()))?;
    let path = base.join(".kubelets.lock");
    let turn = File::create(&path).with_context(|| format!("making {}", path.display()))?;
    turn.lock().context("waiting for another lab with kubelets")?;
    Ok(turn)
}

impl LogDirectory {
    fn claim(name: &str) -> Result<Self> {
        let base = kubernetes::log_directory()?;
        std::fs::create_dir_all(&base).with_context(|| format!("making {}", base.display()))?;
        let names = std::iter::once(name.to_owned()).chain((2..).map(|number| format!("{name}-{number}")));
        for name in names {
            let lock = base.join(format!(".{name}.lock"));
            let lock = File::create(&lock).with_context(|| format!("making {}", lock.display()))?;
            match lock.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => continue,
                Err(TryLockError::Error(error)) => return Err(error).context("locking a directory of logs"),
            }
            let path = base.join(name);
            let _ = std::fs::remove_dir_all(&path);
            std::fs::create_dir_all(&path).with_context(|| format!("making {}", path.display()))?;
            return Ok(Self { path, _lock: lock });
        }
        unreachable!("numbers do not end")
    }
}
