//! `baton serve`, in boot order: settings, logs, address, service, model, engine; then SIGTERM, drain.

use std::{
    net::SocketAddr,
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime},
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use baton_engine::{Engine, EngineConfig};
use baton_http::{
    Adapters, Admission, ApiKey, ConnectionLimits, DecoderEmbeddings, DecoderPooling, Defaults, ListedKey, ModelCard,
    NewGeneration, OutsideCounter, Service, ServiceConfig, Store, StoreLimits, Surface, Tls,
};
use baton_model::LoadReport;
use clap::ArgMatches;
use tokio::{
    signal::unix::{SignalKind, signal},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::{
    backend::Loaded,
    encoder,
    handoff::Gate,
    keys,
    listen::{self, listen},
    load::{self, Kind, Model},
    log::Log,
    memory,
    reload::{self, AdapterLoader},
    renew::{self, Source},
    rollout::{self, Control, Journal, Serving},
    settings::{
        GenerationConfigUse, HandoffPolicy, LoraModule, PoolingType, PrefixCacheScope, Secret, ServeArgs, Settings,
    },
    speculative::SpeculativeConfig,
    state_dir::StateDir,
    traces::{self, Exporter},
};

/// At the end: how long the last spans and the last lines may take to be taken.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Runs the command.
pub fn main(matches: &ArgMatches) -> Result<()> {
    let (args, mut origins) = ServeArgs::from_matches(matches)?;
    let print_config = args.print_config;
    let settings = args.with_file(&mut origins)?.resolve()?;
    if print_config {
        #[allow(clippy::print_stdout)] // what was asked for
        {
            print!("{}", settings.table(&origins)?);
        }
        return Ok(());
    }
    let log = Log::start(&settings)?;
    let exporter = settings.otlp_traces_endpoint.as_ref().map(traces::start).transpose()?.flatten();
    let counters = counters(&log, exporter.as_ref());
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let result = runtime.block_on(serve(settings, &log, exporter.as_ref(), counters));
    // A model that still loads is not waited for.
    runtime.shutdown_background();
    if let Some(exporter) = exporter {
        exporter.stop(LAST_WORDS);
    }
    log.flush(LAST_WORDS);
    result
}

/// What is counted beside the service.
fn counters(log: &Log, exporter: Option<&Exporter>) -> Vec<OutsideCounter> {
    let lost = OutsideCounter {
        name: "baton_log_lines_lost_total",
        help: "Lines of the log that standard error did not take.",
        value: log.lost(),
    };
    let spans = exporter.into_iter().flat_map(|exporter| {
        let counts = exporter.counts();
        let counter = |name, help, value| OutsideCounter { name, help, value };
        [
            counter("baton_trace_spans_exported_total", "Spans that the collector has taken.", counts.exported),
            counter("baton_trace_spans_dropped_total", "Spans that no collector has seen.", counts.dropped),
        ]
    });
    [lost].into_iter().chain(spans).collect()
}

async fn serve(
    settings: Settings,
    log: &Log,
    exporter: Option<&Exporter>,
    counters: Vec<OutsideCounter>,
) -> Result<()> {
    // Signals first: one that comes while the model loads must find us listening.
    let stop = stop_on_signal(log.clone())?;
    let journal = settings.state_dir.as_deref().map(StateDir::open).transpose()?.map(Journal::open).transpose()?;
    // The journal has locked the folder.
    let store = settings.state_dir.as_deref().map(|dir| open_store(dir, &settings)).transpose()?;
    let base = rollout::base(&settings, journal.as_ref());
    let promoted = journal.as_ref().map(|journal| rollout::promoted(journal, &base)).transpose()?.flatten();
    let listener = listen(&settings.host, settings.port, settings.guards_inference()).await?;
    let address = listener.local_addr()?;
    let surfaces = match settings.admin_port {
        None => vec![(listener, Surface::All)],
        Some(port) => {
            let admin = listen(&settings.admin_host, port, settings.guards_admin()).await?;
            info!(address = %admin.local_addr()?, "admin routes");
            vec![(listener, Surface::WithoutAdmin), (admin, Surface::AdminOnly)]
        }
    };
    let tls = tls(&settings).map(Source::load).transpose()?;
    let keys = keys(&settings).map(Source::load).transpose()?;
    let connections = settings.max_connections.unwrap_or_else(listen::connections);
    let service = Service::new(ServiceConfig {
        api_keys: api_keys("api-key", &settings.api_key)?,
        admin_api_keys: api_keys("admin-api-key", &settings.admin_api_key)?,
        listed_keys: keys.as_ref().map(|keys| keys.value.clone()),
        connection_limits: ConnectionLimits { connections, ..ConnectionLimits::default() },
        shared_prefix_cache: settings.prefix_cache_scope == PrefixCacheScope::Shared,
        body_limit_bytes: settings.body_limit_bytes,
        lenient: settings.lenient,
        max_n: settings.max_n,
        queue_timeout: Some(settings.queue_timeout),
        allowed_origins: settings.allowed_origins.iter().map(|allowed| allowed.origin.clone()).collect(),
        allowed_hosts: {
            let hosts = settings.allowed_hosts.iter().chain([&settings.host, &settings.admin_host]);
            // What is no name is an address in a form of its own, of which none need be named.
            hosts.filter_map(|host| host.parse().ok()).collect()
        },
        check_hosts_everywhere: !settings.allowed_hosts.is_empty(),
        store,
        tls: tls.as_ref().map(|tls| tls.value.clone()),
        http2: settings.http2,
        slow_request: Some(settings.slow_request_seconds).filter(|limit| !limit.is_zero()),
        observer: exporter.map(traces::observer),
        counters,
        ..ServiceConfig::default()
    });
    let tls = tls.map(|tls| {
        let shown = tls.value.clone();
        tls.renew(move |new| shown.replace(&new))
    });
    let keys = keys.map(|keys| {
        let service = service.clone();
        keys.renew(move |new| service.replace_listed_keys(&new))
    });
    renew::start(tls.into_iter().chain(keys).collect())?;
    let mut running = JoinSet::new();
    for (listener, surface) in surfaces {
        running.spawn(baton_http::serve(listener, service.clone(), surface, stop.clone(), settings.drain_timeout));
    }

    let settings = Arc::new(settings);
    let loading = tokio::task::spawn_blocking({
        let (settings, promoted) = (settings.clone(), promoted.clone());
        move || {
            let free = memory::available_bytes();
            match &promoted {
                None => load::any(&settings, free),
                Some(promoted) => load::load(&rollout::instead(&settings, promoted), free, &|generation| {
                    rollout::unchanged(promoted, generation)
                })
                .map(|model| Kind::Model(Box::new(model))),
            }
        }
    });
    let model = tokio::select! {
        model = loading => model??,
        // Nothing runs yet that could be waited for.
        () = stop.cancelled() => return Ok(()),
    };
    let model = match model {
        Kind::Model(model) => *model,
        Kind::Encoder(encoder) => {
            let encoder::Model { new, worker } = *encoder;
            service.install_encoder(new);
            info_ready(address);
            ended(running).await?;
            drop(worker);
            info!("stopped");
            return Ok(());
        }
    };
    let names = promoted.as_ref().map(|promoted| promoted.names.clone());
    let Generation { new, engine, report, gate } = prepare(model, &settings, names)?;
    let model = promoted.map_or_else(|| base.clone(), |promoted| promoted.model.display().to_string());
    let (serving, policy) = (Serving::new(model, &new, &report, engine), settings.handoff);
    let begin = || {
        service.install(new);
        tokio::spawn(admit(gate, policy, address));
    };
    match journal {
        None => {
            begin();
            ended(running).await?;
            serving.end();
        }
        Some(journal) => {
            let start = rollout::Start { service: service.clone(), settings, base, journal, serving };
            let control = Control::start(start, tokio::runtime::Handle::current());
            service.set_rollout(control.clone());
            begin();
            tokio::spawn({
                let control = control.clone();
                async move {
                    stop.cancelled().await;
                    control.drain();
                }
            });
            ended(running).await?;
            control.stop();
        }
    }
    info!("stopped");
    Ok(())
}

/// Has a generation proven and watched, and says when it is ready.
async fn admit(gate: Gate, policy: HandoffPolicy, address: SocketAddr) {
    // Where proof is required nobody is served before; where it is not, nobody waits for it.
    let at_once = policy != HandoffPolicy::Require;
    if at_once {
        info_ready(address);
    }
    let gate = gate.prove().await;
    if !at_once && gate.state().admission() == Admission::Passed {
        info_ready(address);
    }
    gate.watch().await;
}

fn info_ready(address: SocketAddr) {
    info!(%address, resident_mib = memory::resident_bytes().unwrap_or(0) >> 20, "ready");
}

fn open_store(dir: &Path, settings: &Settings) -> Result<Store> {
    let limits = StoreLimits { file_bytes: settings.file_limit_bytes, total_bytes: settings.files_total_bytes };
    Store::open(dir, limits).with_context(|| format!("--state-dir {}", dir.display()))
}

fn tls(settings: &Settings) -> Option<Source<Tls>> {
    let (Some(certificate), Some(key)) = (&settings.ssl_certfile, &settings.ssl_keyfile) else { return None };
    let paths = [certificate, key].into_iter().chain(&settings.ssl_ca_certs).cloned().collect();
    Some(Source::new("TLS (--ssl-certfile, --ssl-keyfile, --ssl-ca-certs)", paths, |contents| {
        let [certificate, key, authorities @ ..] = contents else { bail!("a certificate and its key are needed") };
        Ok(Tls::new(certificate, key, authorities.first().map(Vec::as_slice))?)
    }))
}

fn keys(settings: &Settings) -> Option<Source<Vec<ListedKey>>> {
    let path = settings.api_keys_file.clone()?;
    Some(Source::new("--api-keys-file", vec![path], |contents| keys::parse(&contents.concat())))
}

/// Waits for all listeners.
async fn ended(mut running: JoinSet<std::io::Result<()>>) -> Result<()> {
    while let Some(ended) = running.join_next().await {
        ended??;
    }
    Ok(())
}

fn api_keys(flag: &str, keys: &[Secret]) -> Result<Vec<ApiKey>> {
    let key =
        |k: &Secret| ApiKey::new(k.0.clone()).with_context(|| format!("--{flag} must be visible ASCII characters"));
    keys.iter().map(key).collect()
}

/// A model whose engine runs, and all that a service needs of it.
pub struct Generation {
    pub new: NewGeneration,
    pub engine: Engine,
    pub report: LoadReport,
    pub gate: Gate,
}

/// Starts the engine of a model. Its names are the settings', else those given, else its own.
pub fn prepare(mut model: Model, settings: &Settings, names: Option<Vec<String>>) -> Result<Generation> {
    let generation = &model.loaded.report.generation_config;
    let eos_token_ids = generation.eos_token_ids.clone();
    let defaults = match settings.generation_config {
        GenerationConfigUse::None => Defaults { eos_token_ids, ..Defaults::default() },
        GenerationConfigUse::Auto => Defaults {
            do_sample: generation.do_sample,
            temperature: generation.temperature,
            top_p: generation.top_p,
            top_k: generation.top_k,
            min_p: generation.min_p,
            repetition_penalty: generation.repetition_penalty,
            max_new_tokens: generation.max_new_tokens.map(|n| u32::try_from(n).unwrap_or(u32::MAX)),
            eos_token_ids,
        },
    };
    let names = match settings.served_model_name.as_slice() {
        [] => names.unwrap_or_else(|| vec![model.name]),
        names => names.to_vec(),
    };
    let card = ModelCard {
        names,
        created: SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_secs()),
        owned_by: "baton".into(),
        generation: model.generation.to_string(),
        system_fingerprint: model.fingerprint,
        defaults,
        load_report: model.report,
        embeddings: Some(DecoderEmbeddings {
            pooling: match settings.pooling_type {
                None | Some(PoolingType::Last) => DecoderPooling::Last,
                Some(PoolingType::Mean) => DecoderPooling::Mean,
                Some(_) => bail!("--pooling-type of a model that generates is last or mean"),
            },
            width: model.loaded.report.hidden_size,
        }),
    };
    let loader = model.loaded.load_adapter.take().map(AdapterLoader::new);
    let adapters = match loader.clone() {
        None => Adapters::none(),
        Some(loader) => Adapters::new(settings.max_loras, move |folder| loader.load(folder)),
    };
    for LoraModule { name, base_model_name, .. } in &settings.lora_modules {
        let served = base_model_name.as_ref().is_none_or(|base| card.names.contains(base));
        ensure!(served, "--lora-modules {name}: its base_model_name is not served; {} is", card.names.join(", "));
    }
    for (name, folder, adapter) in model.adapters {
        adapters
            .add(&card, &name, folder, adapter, false)
            .map_err(|reason| anyhow!("--lora-modules {name}: {reason}"))?;
    }
    let config = EngineConfig {
        max_num_seqs: settings.max_num_seqs,
        max_num_batched_tokens: settings.max_num_batched_tokens,
        max_queued: settings.max_queued_requests,
        max_queued_tokens: settings.max_queued_tokens,
        enable_prefix_caching: settings.enable_prefix_caching,
        speculation: settings.speculative_config.as_ref().map(SpeculativeConfig::speculation),
        cache_namespace: model.generation.0.to_vec(),
        device_timeout: model.source.device_timeout(),
        ..EngineConfig::default()
    };
    let Loaded { runner, report, caps, .. } = model.loaded;
    let rebuild = reload::rebuild(model.source, loader, adapters.clone());
    let (handle, engine) = baton_engine::spawn_rebuildable(runner, rebuild, config);
    let text = Arc::new(model.text);
    let gate = Gate::new(model.handed, settings, (caps, &report), handle.clone(), text.clone());
    let new = NewGeneration { engine: handle, text, card, adapters, handoff: gate.state() };
    Ok(Generation { new, engine, report, gate })
}

/// Cancelled by SIGTERM or SIGINT; a second signal ends the process at once, but for the last lines of the log.
fn stop_on_signal(log: Log) -> Result<CancellationToken> {
    let stop = CancellationToken::new();
    let (mut term, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let token = stop.clone();
    tokio::spawn(async move {
        let mut next = async || tokio::select! { _ = term.recv() => "SIGTERM", _ = interrupt.recv() => "SIGINT" };
        let name = next().await;
        info!(signal = name, "draining");
        token.cancel();
        let name = next().await;
        warn!(signal = name, "ending at once, without what is still under way");
        log.flush(LAST_WORDS);
        std::process::exit(1);
    });
    Ok(stop)
}
